"""Former name of a schema."""

SPEED = "speed"
