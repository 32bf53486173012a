"""EasyCache against the plain run, simpler ways to save forwards, and the caches of diffusers."""
