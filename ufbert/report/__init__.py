"""What a person looks at after a run. Reads run folders only."""
