"""Human studies: a page for blind voting over results, and the score of its votes."""
