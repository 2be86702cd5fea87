"""How the tests compile. tests/conftest.py turns most optimizations off, which halves the time of compiling, and that
is most of the tests' time; of the programs that tests start on their own, those that are given UNOPTIMIZED."""

# For the environment of a program that is started.
UNOPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

# For jax.jit(..., compiler_options=OPTIMIZED): a test that runs long, or whose numbers hang on what a user's program
# rounds (without optimizations no multiply and add are fused into one rounding).
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
