"""Guards that read the bytes of untrusted files before a library decodes them (docs/background/hardening.md)."""
