"""How the engine is compiled, warmed up and captured: named settings, in force only while a pair's engine is built."""
