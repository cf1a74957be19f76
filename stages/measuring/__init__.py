"""What a stage measures of itself and its links, each on its own clock. Imports `bus` only; the stages room imports it."""
