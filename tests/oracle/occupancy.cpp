// The occupancy calculator of NVIDIA (cuda_occupancy.h): reads lines "major minor registers threads shared" and prints for
// each the number of blocks per multiprocessor.
#include <cuda_occupancy.h>

#include <cstdio>

int main() {
  int major, minor, registers, threads;
  size_t shared;
  while (scanf("%d %d %d %d %zu", &major, &minor, &registers, &threads, &shared) == 5) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 2048;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = (major == 8 ? 164 : 228) << 10;
    device.sharedMemPerBlockOptin = (major == 8 ? 163 : 227) << 10;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 132;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    const auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -int(error));
  }
}
