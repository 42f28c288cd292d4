"""The paper's schedules and their study. Nothing that serves imports it."""
