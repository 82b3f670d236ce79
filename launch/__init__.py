"""Starting liverseg_dist on clusters. Imports the package; nothing imports this."""
