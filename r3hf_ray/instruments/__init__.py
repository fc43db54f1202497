"""What people look at and measure with; nothing below imports it."""
