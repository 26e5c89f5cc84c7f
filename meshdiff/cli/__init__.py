"""The command line: lists of requests, the files of a run, and its metrics."""
