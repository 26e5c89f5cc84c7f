"""Calls as graphs: the operations and collectives of one rank."""
