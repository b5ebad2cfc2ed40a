"""The command line: thin verbs over the public functions; torch is imported when a run needs it."""
