"""Names that were removed, with what replaces them: launch.py answers an old name with the new one."""

# old experiment -> what to type instead
EXPERIMENTS: dict[str, str] = {}

# old setting -> new one; with `=`, an old value -> the new one
SETTINGS: dict[str, str] = {}
