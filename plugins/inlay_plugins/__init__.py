"""inlay's own editing methods, one plugin per file, loaded exactly as a third party's are."""
