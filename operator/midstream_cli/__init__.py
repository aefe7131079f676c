"""`midstream`: move serving pods between nodes while they stream."""
