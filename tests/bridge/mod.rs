//! Tests of the bridge: what it adds to tch, without and with a CUDA device.

crate::modules![libtorch, recorder, autograd_node, fused, cuda_library, gpu_streams,];
