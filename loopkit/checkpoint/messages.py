"""What the errors about checkpoints have in common."""

SAVE = "checkpoints.save(state)"
RESTORE = "checkpoints.restore(state)"
ANOTHER_COPY = "an older checkpoint, or a copy of this one from elsewhere"
PLAIN_DATA = (
    "plain data there: numbers, text, dense tensors, arrays, and lists, tuples, sets and dicts"
    " of those; or an object whose state_dict gives such data"
)
