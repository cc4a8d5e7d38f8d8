"""gradlens finds the clients that poison a federated model and shows where they gave themselves away."""
