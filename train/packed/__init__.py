"""Rows of several documents, as models read them: positions that begin anew, attention within."""
