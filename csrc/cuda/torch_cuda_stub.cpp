// Stand-in for libtorch_cuda.so at link time where torch has no CUDA (see CMakeLists.txt): only its
// name enters _C_cuda.so. It is not installed.
extern "C" __attribute__((visibility("default"))) int aoti_torch_get_current_cuda_stream(int,
                                                                                         void**) {
  return 1;
}
