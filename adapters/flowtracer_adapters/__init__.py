"""Built-in attention adapters."""

ADAPTERS = ()
