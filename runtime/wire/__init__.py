"""What all processes share: messages, errors, handlers and sockets."""
