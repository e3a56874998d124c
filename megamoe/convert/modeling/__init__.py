"""Code that is copied beside exported weights; nothing here is imported by megamoe, or imports it."""
