"""How training is drawn toward a plan."""
