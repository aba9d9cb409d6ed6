"""Tasks that minillm writes itself, the same for the same seed; each file says by which rule its labels hold."""
