"""The plan's files: the manifest and its schema, typed JSON, hashes, goldens."""
