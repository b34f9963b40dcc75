"""What all processes speak: messages, errors, handlers and sockets."""
