"""Pure tensor functions: torch in, torch out; no state, files, logging or choice of device."""
