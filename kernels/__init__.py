"""Every operation of the decode path, each beside its plain PyTorch reference."""
