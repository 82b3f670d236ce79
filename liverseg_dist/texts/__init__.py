"""Text input of users: files, tables, paths and names of scans.

- `decode` converts the bytes of a file to text.
- `structured` reads YAML and JSON.
- `tables` reads CSV and TSV; `matching` assigns their rows to scans.
- `paths` expands `~` and variables in paths.
- `names` derives the id of a scan from its file name.
- `formats` recognises scans in unsupported formats.
- `suggestions` finds the known name that is nearest to a misspelt one.
"""
