"""Everything that users give as text: files, tables, paths, names of scans.

`decode` turns the bytes of a file into text, `structured` reads YAML and JSON, `tables` CSV and
TSV, `paths` expands what is written for a path, `names` derives the id of a scan from its file
name.
"""
