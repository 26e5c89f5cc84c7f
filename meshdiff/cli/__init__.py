"""The command line: its flags, lists of requests, the files of a run, and its metrics."""
