"""The engine core: pages, scheduler, step batches, compiled steps, sampling.  Knows no text and no HTTP."""
