"""Hard ties: one stored copy of what a plan says is equal, kept while a user's training goes on."""
