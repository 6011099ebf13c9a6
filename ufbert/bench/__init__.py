"""Speed measured against named peers: answers are checked first, then blocks of work alternate between the processes."""
