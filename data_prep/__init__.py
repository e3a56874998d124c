"""Text in, tokenised shards out: `megamoe data ...`; see docs/data.md."""
