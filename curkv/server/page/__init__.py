"""GET /: a playground and a live view of the cache, in plain HTML, CSS and JavaScript."""
