"""Changes of a cache's teachers: removed, renamed, kept in another codec; and what there is."""
