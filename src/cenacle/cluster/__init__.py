"""Starting ranks and keeping an eye on them."""
