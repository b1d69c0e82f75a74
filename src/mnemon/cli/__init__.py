"""The command line: parsing, messages and exit codes. All work is done by the library's other parts."""
