"""OpenAI's API over HTTP: a process of its own, which is a client of the router."""
