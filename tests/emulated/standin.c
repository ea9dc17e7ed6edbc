/* A stand-in for libcuda: the functions that libadasplash calls, which refuse what the driver would refuse and hand
 * what is left to Python. Handles are small numbers: device d is d, its context d + 1, libraries and kernels what Python
 * gave them. */
#include <pthread.h>
#include <stdint.h>
#include <string.h>

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  NOT_INITIALIZED = 3,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  NOT_FOUND = 500,
  LAUNCH_OUT_OF_RESOURCES = 701,
};
enum { MAX_DEVICES = 16, MAX_KERNELS = 4096, MAX_CALLS = 16, SHARED_BY_DEFAULT = 48 * 1024 };

/* What Python does: 0 or a positive handle for success, a negative error otherwise. */
typedef struct {
  int (*load)(const void* code, int device);
  int (*find)(int library, const char* name);
  int (*launch)(int kernel, int device, uint64_t stream, unsigned programs, unsigned threads, unsigned shared,
                int early, const void* arguments, uint64_t size);
} Handlers;

static struct {
  Handlers handlers;
  int version, devices, initialized;
  int capability[MAX_DEVICES];                  /* 80, 90, ... */
  int shared_limit[MAX_DEVICES];                /* bytes that a block may ask for */
  int shared_allowed[MAX_DEVICES][MAX_KERNELS]; /* bytes that were asked for, kernel by kernel */
  struct {
    char name[32];
    int calls, fail_with, failures;
  } call[MAX_CALLS];
} state;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int context; /* of this thread: 0 none, d + 1 device d */
static char error_text[4096];

static int entry(const char* name) { /* with the lock held */
  int i = 0;
  while (i < MAX_CALLS - 1 && state.call[i].name[0] && strcmp(state.call[i].name, name) != 0) ++i;
  strncpy(state.call[i].name, name, sizeof state.call[i].name - 1);
  return i;
}

/* Counts a call, and fails it if it was told to. */
static int begin(const char* name) {
  pthread_mutex_lock(&lock);
  const int i = entry(name);
  state.call[i].calls++;
  int result = SUCCESS;
  if (state.call[i].failures > 0) {
    state.call[i].failures--;
    result = state.call[i].fail_with;
  }
  pthread_mutex_unlock(&lock);
  return result;
}

#define BEGIN()                        \
  const int failure = begin(__func__); \
  if (failure) return failure
#define INITIALIZED() \
  if (!state.initialized) return NOT_INITIALIZED

/* ---- what tests set and ask ---- */

void standin_reset(Handlers handlers, int version, int devices) {
  pthread_mutex_lock(&lock);
  memset(&state.call, 0, sizeof state.call);
  state.handlers = handlers;
  state.version = version;
  state.devices = devices;
  pthread_mutex_unlock(&lock);
}
void standin_device(int device, int capability, int shared_limit) {
  state.capability[device] = capability;
  state.shared_limit[device] = shared_limit;
}
void standin_fail(const char* name, int result, int times) {
  pthread_mutex_lock(&lock);
  const int i = entry(name);
  state.call[i].fail_with = result;
  state.call[i].failures = times;
  pthread_mutex_unlock(&lock);
}
int standin_calls(const char* name) {
  pthread_mutex_lock(&lock);
  const int calls = state.call[entry(name)].calls;
  pthread_mutex_unlock(&lock);
  return calls;
}
void standin_set_context(int value) { context = value; }
void standin_set_error_text(const char* text) { strncpy(error_text, text, sizeof error_text - 1); }

/* ---- the driver's functions ---- */

int cuInit(unsigned flags) {
  BEGIN();
  if (flags) return INVALID_VALUE;
  state.initialized = 1;
  return SUCCESS;
}
int cuDriverGetVersion(int* version) {
  BEGIN();
  *version = state.version;
  return SUCCESS;
}
int cuGetErrorName(int result, const char** name) {
  *name = result == INVALID_VALUE             ? "CUDA_ERROR_INVALID_VALUE"
          : result == 2                       ? "CUDA_ERROR_OUT_OF_MEMORY"
          : result == NOT_FOUND               ? "CUDA_ERROR_NOT_FOUND"
          : result == 209                     ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
          : result == LAUNCH_OUT_OF_RESOURCES ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"
          : result == 719                     ? "CUDA_ERROR_LAUNCH_FAILED"
                                              : "CUDA_ERROR_OF_THE_STAND_IN";
  return SUCCESS;
}
int cuGetErrorString(int result, const char** text) {
  *text = result == SUCCESS ? "no error" : error_text;
  return SUCCESS;
}
int cuDeviceGet(int* device, int ordinal) {
  BEGIN();
  INITIALIZED();
  if (ordinal < 0 || ordinal >= state.devices) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  BEGIN();
  INITIALIZED();
  if (device < 0 || device >= state.devices) return INVALID_DEVICE;
  if (attribute != 75 && attribute != 76) return INVALID_VALUE;
  *value = attribute == 75 ? state.capability[device] / 10 : state.capability[device] % 10;
  return SUCCESS;
}
int cuCtxGetCurrent(void** current) {
  BEGIN();
  INITIALIZED();
  *current = (void*)(intptr_t)context;
  return SUCCESS;
}
int cuCtxSetCurrent(void* wanted) {
  BEGIN();
  INITIALIZED();
  if ((intptr_t)wanted < 0 || (intptr_t)wanted > state.devices) return INVALID_CONTEXT;
  context = (int)(intptr_t)wanted;
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** retained, int device) {
  BEGIN();
  INITIALIZED();
  if (device < 0 || device >= state.devices) return INVALID_DEVICE;
  *retained = (void*)(intptr_t)(device + 1);
  return SUCCESS;
}
int cuLibraryLoadData(void** library, const void* code, void* jit_options, void* jit_values, unsigned jit_count,
                      void* options, void* values, unsigned count) {
  BEGIN();
  INITIALIZED();
  if (jit_options || jit_values || jit_count || options || values || count) return INVALID_VALUE;
  if (!context) return INVALID_CONTEXT;
  const int handle = state.handlers.load(code, context - 1);
  if (handle < 0) return -handle;
  *library = (void*)(intptr_t)handle;
  return SUCCESS;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  BEGIN();
  INITIALIZED();
  const int handle = state.handlers.find((int)(intptr_t)library, name);
  if (handle < 0) return -handle;
  *kernel = (void*)(intptr_t)handle;
  return SUCCESS;
}
int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  BEGIN();
  INITIALIZED();
  if (device < 0 || device >= state.devices) return INVALID_DEVICE;
  const intptr_t handle = (intptr_t)kernel;
  if (attribute != 8 || handle <= 0 || handle >= MAX_KERNELS || value > state.shared_limit[device])
    return INVALID_VALUE;
  state.shared_allowed[device][handle] = value;
  return SUCCESS;
}

typedef struct {
  int id, unused;
  union {
    int allowed;
    char size[64];
  } value;
} LaunchAttribute;

typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned attribute_count;
} LaunchConfig;

int cuLaunchKernelEx(const LaunchConfig* config, void* kernel, void** parameters, void** extra) {
  BEGIN();
  INITIALIZED();
  if (!context) return INVALID_CONTEXT;
  const int device = context - 1;
  const intptr_t handle = (intptr_t)kernel;
  if (handle <= 0 || handle >= MAX_KERNELS || config->attribute_count > 1 || parameters || !extra) return INVALID_VALUE;
  if (!config->grid[0] || config->grid[0] > INT32_MAX || config->grid[1] != 1 || config->grid[2] != 1)
    return INVALID_VALUE;
  if (!config->block[0] || config->block[0] > 1024 || config->block[1] != 1 || config->block[2] != 1)
    return INVALID_VALUE;
  // The only attribute that there may be: that the kernel may begin while the one ahead runs.
  const int early = config->attribute_count == 1;
  if (early && (config->attributes[0].id != 6 || config->attributes[0].value.allowed != 1)) return INVALID_VALUE;
  const unsigned allowed = state.shared_allowed[device][handle];
  if (config->shared > (allowed > SHARED_BY_DEFAULT ? allowed : SHARED_BY_DEFAULT)) return LAUNCH_OUT_OF_RESOURCES;
  if (extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4] != 0) return INVALID_VALUE;
  const int result =
      state.handlers.launch((int)handle, device, (uint64_t)(uintptr_t)config->stream, config->grid[0],
                            config->block[0], config->shared, early, extra[1], *(const uint64_t*)extra[3]);
  return result < 0 ? -result : SUCCESS;
}
