"""What ``launch.py`` can do, a file for each command: parse, open the data, call, say how it went."""
