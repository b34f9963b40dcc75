"""Configuration, messages, the request router and the client."""
