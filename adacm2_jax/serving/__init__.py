"""A server: sessions over HTTP, an endpoint that OpenAI's clients can call (``adacm2 serve``)."""
