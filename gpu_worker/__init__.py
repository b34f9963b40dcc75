"""The worker process: holds the model, the resident rows and the index; prefills and decodes."""
