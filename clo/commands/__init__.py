"""The commands of ``clo``, one module each: ``parser()`` has its options, ``main(argv)`` runs it."""
