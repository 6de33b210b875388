"""distclip inside other frameworks: one module each, which imports its framework only when it is used."""
