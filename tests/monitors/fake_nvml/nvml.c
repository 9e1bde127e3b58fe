/* A stand-in for NVIDIA's libnvidia-ml.so.1, as far as monitors ask it. No line of it is NVIDIA's.
 *
 * Everything it answers lies in a file that it maps (FAKE_NVML_STATE), so that whoever maps the same file changes what
 * the cards say while somebody asks. Each function can be made to fail, to wait and to hang, as a whole or of one card,
 * and counts its calls. tests/nvml_parts.py has the same structures for ctypes; a test holds both against each other.
 *
 * As in the real one, a card is attached to when it is first looked up, and a look-up by UUID attaches to all cards on
 * its way. `attach` is a function of its own here, for that.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/futex.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_GPUS = 16, MAX_FUNCTIONS = 80, MAX_PROCESSES = 64, MAX_MIGS = 7, MAX_FANS = 4, MAX_FIELDS = 8, RING = 1024 };
enum { OK = 0, UNINITIALIZED = 1, BAD_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NO_LIBRARY = 12, TIMEOUT = 10 };

#define FUNCTIONS(X)                                                                                                   \
    X(nvmlInitWithFlags) X(nvmlInit_v2) X(nvmlShutdown) X(nvmlSystemGetDriverVersion) X(nvmlSystemGetNVMLVersion)      \
    X(nvmlSystemGetCudaDriverVersion) X(nvmlSystemGetCudaDriverVersion_v2) X(nvmlDeviceGetCount_v2) X(attach)          \
    X(nvmlDeviceGetHandleByIndex_v2) X(nvmlDeviceGetHandleByUUID) X(nvmlDeviceGetHandleByPciBusId_v2)                  \
    X(nvmlDeviceGetIndex) X(nvmlDeviceGetUUID) X(nvmlDeviceGetName) X(nvmlDeviceGetPciInfo_v3) X(nvmlDeviceGetSerial)  \
    X(nvmlDeviceGetMemoryInfo) X(nvmlDeviceGetMemoryInfo_v2) X(nvmlDeviceGetUtilizationRates)                          \
    X(nvmlDeviceGetTemperature) X(nvmlDeviceGetPowerUsage) X(nvmlDeviceGetEnforcedPowerLimit)                          \
    X(nvmlDeviceGetPowerManagementLimit) X(nvmlDeviceGetTotalEnergyConsumption) X(nvmlDeviceGetClockInfo)              \
    X(nvmlDeviceGetMaxClockInfo) X(nvmlDeviceGetCurrentClocksEventReasons)                                             \
    X(nvmlDeviceGetCurrentClocksThrottleReasons) X(nvmlDeviceGetTotalEccErrors) X(nvmlDeviceGetRemappedRows)           \
    X(nvmlDeviceGetFieldValues) X(nvmlDeviceGetCurrPcieLinkGeneration) X(nvmlDeviceGetCurrPcieLinkWidth)               \
    X(nvmlDeviceGetNumFans) X(nvmlDeviceGetFanSpeed) X(nvmlDeviceGetFanSpeed_v2) X(nvmlDeviceGetPerformanceState)      \
    X(nvmlDeviceGetPersistenceMode) X(nvmlDeviceGetComputeMode) X(nvmlDeviceGetDisplayActive)                          \
    X(nvmlDeviceGetDisplayMode) X(nvmlDeviceGetEncoderUtilization) X(nvmlDeviceGetDecoderUtilization)                  \
    X(nvmlDeviceGetComputeRunningProcesses_v3) X(nvmlDeviceGetGraphicsRunningProcesses_v3)                             \
    X(nvmlDeviceGetProcessUtilization) X(nvmlDeviceGetMigMode) X(nvmlDeviceGetMaxMigDeviceCount)                       \
    X(nvmlDeviceGetMigDeviceHandleByIndex) X(nvmlDeviceGetGpuInstanceId) X(nvmlDeviceGetComputeInstanceId)             \
    X(nvmlDeviceIsMigDeviceHandle) X(nvmlDeviceGetDeviceHandleFromMigDeviceHandle)                                     \
    X(nvmlDeviceGetSupportedEventTypes) X(nvmlEventSetCreate) X(nvmlDeviceRegisterEvents) X(nvmlEventSetWait_v2)       \
    X(nvmlEventSetFree) X(nvmlDeviceGetPcieThroughput) X(nvmlDeviceGetDriverModel) X(nvmlDeviceGetDriverModel_v2)      \
    X(nvmlDeviceGetCudaComputeCapability)

#define NUMBER(name) F_##name,
enum { FUNCTIONS(NUMBER) FUNCTION_COUNT };
_Static_assert((int)FUNCTION_COUNT <= (int)MAX_FUNCTIONS, "more functions than there is room for");

/* --- the state, as both sides map it */

struct call { uint64_t count; int32_t error; uint32_t hang; uint32_t delay_us; uint32_t unused; };
struct process { uint64_t memory, stamp_us; uint32_t pid, graphics, sm, mem, enc, dec; };
struct mig { char uuid[96]; uint64_t total, reserved, used; uint32_t instance, compute; };
struct field { uint32_t id; int32_t error; };
struct gpu {
    char uuid[96], name[96], bus_id[32];
    uint64_t memory_total, memory_reserved, memory_used, energy_mj, reasons, ecc[2][2];
    uint64_t pcie_sent, pcie_received, nvlink_sent_kib, nvlink_received_kib, nvlink_errors[3], event_types;
    uint32_t utilization, memory_utilization, temperature, memory_temperature;
    uint32_t power_mw, power_average_mw, power_instant_mw, power_limit_mw, clocks_mhz[4], remapped[4];
    uint32_t recovery_action, pcie_replays, pcie_generation, pcie_width, fans, fan_percent[MAX_FANS];
    uint32_t mig_supported, mig_mode, migs, processes;
    int32_t error; /* of every function of this card */
    struct field fields[MAX_FIELDS];
    struct mig mig[MAX_MIGS];
    struct process process[MAX_PROCESSES];
    struct call calls[MAX_FUNCTIONS];
};
struct event { uint64_t type, data; uint32_t gpu, unused; };
struct state {
    uint32_t gpus, events; /* events: written so far, and a futex */
    char driver[80];
    struct event ring[RING];
    struct call calls[MAX_FUNCTIONS];
    struct gpu gpu[MAX_GPUS];
};

/* --- NVML's structures */

struct device { struct gpu *gpu; struct mig *mig; };
typedef struct device *device_t;
typedef int ret;
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } nvmlMemory_v2_t;
typedef struct { unsigned gpu, memory; } nvmlUtilization_t;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } nvmlPciInfo_t;
typedef struct { unsigned pid; unsigned long long memory; unsigned instance, compute; } nvmlProcessInfo_v2_t;
typedef struct { unsigned pid; unsigned long long stamp; unsigned sm, mem, enc, dec; } nvmlProcessUtilizationSample_t;
typedef union { double d; unsigned u; unsigned long ul; unsigned long long ull; long long sll; int i; unsigned short us; } nvmlValue_t;
typedef struct { unsigned id, scope; long long stamp, latency; unsigned kind; ret code; nvmlValue_t value; } nvmlFieldValue_t;
typedef struct { device_t device; unsigned long long type, data; unsigned instance, compute; } nvmlEventData_t;
struct set { uint32_t read; uint64_t types[MAX_GPUS]; };

static struct state *state;
static int started;
static struct device devices[MAX_GPUS], mig_devices[MAX_GPUS][MAX_MIGS];

static ret open_state(void) {
    if (state) return OK;
    const char *path = getenv("FAKE_NVML_STATE");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return NO_LIBRARY;
    void *found = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (found == MAP_FAILED) return NO_LIBRARY;
    state = found;
    for (int i = 0; i < MAX_GPUS; i++) {
        devices[i].gpu = &state->gpu[i];
        for (int j = 0; j < MAX_MIGS; j++) mig_devices[i][j] = (struct device){&state->gpu[i], &state->gpu[i].mig[j]};
    }
    return OK;
}

static ret pass(struct call *call) {
    __atomic_add_fetch(&call->count, 1, __ATOMIC_SEQ_CST);
    if (call->delay_us) usleep(call->delay_us);
    while (*(volatile uint32_t *)&call->hang) usleep(500);
    return *(volatile int32_t *)&call->error;
}

static ret enter(int function) {
    ret code = open_state();
    if (code) return code;
    if ((code = pass(&state->calls[function]))) return code;
    return started || function == F_nvmlInitWithFlags || function == F_nvmlInit_v2 ? OK : UNINITIALIZED;
}

static ret enter_card(int function, device_t device) {
    ret code = enter(function);
    if (code) return code;
    if (!device) return BAD_ARGUMENT;
    if ((code = pass(&device->gpu->calls[function]))) return code;
    return *(volatile int32_t *)&device->gpu->error;
}

#define BEGIN(name) do { ret code_ = enter(F_##name); if (code_) return code_; } while (0)
#define CARD(name) do { ret code_ = enter_card(F_##name, device); if (code_) return code_; } while (0)

static ret copy(char *into, unsigned size, const char *text) {
    if (strlen(text) >= size) return TOO_SMALL;
    strcpy(into, text);
    return OK;
}

/* --- for the tests */

unsigned long fakeSizeOf(const char *name) {
#define SIZE(type) if (!strcmp(name, #type)) return sizeof(type)
    SIZE(struct state); SIZE(struct gpu); SIZE(struct call); SIZE(struct process); SIZE(struct mig);
    SIZE(nvmlMemory_t); SIZE(nvmlMemory_v2_t); SIZE(nvmlUtilization_t); SIZE(nvmlPciInfo_t); SIZE(nvmlProcessInfo_v2_t);
    SIZE(nvmlProcessUtilizationSample_t); SIZE(nvmlValue_t); SIZE(nvmlFieldValue_t); SIZE(nvmlEventData_t);
    if (!strcmp(name, "state.gpu")) return offsetof(struct state, gpu);
    if (!strcmp(name, "gpu.calls")) return offsetof(struct gpu, calls);
    return 0;
}

/* --- the library and its cards */

ret nvmlInitWithFlags(unsigned flags) { (void)flags; BEGIN(nvmlInitWithFlags); started++; return OK; }
ret nvmlInit_v2(void) { BEGIN(nvmlInit_v2); started++; return OK; }
ret nvmlShutdown(void) { BEGIN(nvmlShutdown); started--; return OK; }
const char *nvmlErrorString(ret code) { return code == OK ? "Success" : code == 999 ? "Unknown Error" : "Error"; }
ret nvmlSystemGetDriverVersion(char *text, unsigned size) { BEGIN(nvmlSystemGetDriverVersion); return copy(text, size, state->driver); }
ret nvmlSystemGetNVMLVersion(char *text, unsigned size) { BEGIN(nvmlSystemGetNVMLVersion); return copy(text, size, state->driver); }
ret nvmlSystemGetCudaDriverVersion(int *value) { BEGIN(nvmlSystemGetCudaDriverVersion); *value = 12080; return OK; }
ret nvmlSystemGetCudaDriverVersion_v2(int *value) { BEGIN(nvmlSystemGetCudaDriverVersion_v2); *value = 12080; return OK; }
ret nvmlDeviceGetCount_v2(unsigned *count) { BEGIN(nvmlDeviceGetCount_v2); *count = state->gpus; return OK; }

static ret look_up(int function, unsigned index, device_t *device) {
    if (index >= state->gpus) return NOT_FOUND;
    ret code = enter_card(F_attach, &devices[index]);
    if (code || (code = enter_card(function, &devices[index]))) return code;
    *device = &devices[index];
    return OK;
}

ret nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) {
    BEGIN(nvmlDeviceGetHandleByIndex_v2);
    return index < state->gpus ? look_up(F_nvmlDeviceGetHandleByIndex_v2, index, device) : BAD_ARGUMENT;
}

ret nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device) {
    BEGIN(nvmlDeviceGetHandleByUUID);
    for (unsigned i = 0; i < state->gpus; i++) {
        if (!strcmp(uuid, state->gpu[i].uuid)) return look_up(F_nvmlDeviceGetHandleByUUID, i, device);
        enter_card(F_attach, &devices[i]); /* all cards on the way */
    }
    return NOT_FOUND;
}

ret nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, device_t *device) {
    BEGIN(nvmlDeviceGetHandleByPciBusId_v2);
    for (unsigned i = 0; i < state->gpus; i++)
        if (!strcasecmp(bus_id, state->gpu[i].bus_id)) return look_up(F_nvmlDeviceGetHandleByPciBusId_v2, i, device);
    return NOT_FOUND;
}

ret nvmlDeviceGetIndex(device_t device, unsigned *index) { CARD(nvmlDeviceGetIndex); *index = (unsigned)(device->gpu - state->gpu); return OK; }
ret nvmlDeviceGetUUID(device_t device, char *text, unsigned size) {
    CARD(nvmlDeviceGetUUID);
    return copy(text, size, device->mig ? device->mig->uuid : device->gpu->uuid);
}
ret nvmlDeviceGetName(device_t device, char *text, unsigned size) { CARD(nvmlDeviceGetName); return copy(text, size, device->gpu->name); }
ret nvmlDeviceGetSerial(device_t device, char *text, unsigned size) { CARD(nvmlDeviceGetSerial); (void)text, (void)size; return NOT_SUPPORTED; }
ret nvmlDeviceGetPciInfo_v3(device_t device, nvmlPciInfo_t *pci) {
    CARD(nvmlDeviceGetPciInfo_v3);
    memset(pci, 0, sizeof *pci);
    memcpy(pci->bus_id, device->gpu->bus_id, sizeof pci->bus_id);
    snprintf(pci->legacy, sizeof pci->legacy, "%.15s", device->gpu->bus_id + 4);
    sscanf(device->gpu->bus_id, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device);
    return OK;
}

/* --- readings */

ret nvmlDeviceGetMemoryInfo(device_t device, nvmlMemory_t *memory) {
    CARD(nvmlDeviceGetMemoryInfo);
    struct gpu *gpu = device->gpu;
    uint64_t total = device->mig ? device->mig->total : gpu->memory_total;
    uint64_t used = device->mig ? device->mig->used + device->mig->reserved : gpu->memory_used + gpu->memory_reserved;
    *memory = (nvmlMemory_t){total, total - used, used}; /* version 1 counts what is reserved as used */
    return OK;
}
ret nvmlDeviceGetMemoryInfo_v2(device_t device, nvmlMemory_v2_t *memory) {
    CARD(nvmlDeviceGetMemoryInfo_v2);
    if (memory->version != (sizeof *memory | 2u << 24)) return 25;
    struct gpu *gpu = device->gpu;
    uint64_t total = device->mig ? device->mig->total : gpu->memory_total, used = device->mig ? device->mig->used : gpu->memory_used;
    uint64_t reserved = device->mig ? device->mig->reserved : gpu->memory_reserved;
    *memory = (nvmlMemory_v2_t){memory->version, total, reserved, total - used - reserved, used};
    return OK;
}
ret nvmlDeviceGetUtilizationRates(device_t device, nvmlUtilization_t *rates) {
    CARD(nvmlDeviceGetUtilizationRates);
    if (device->mig) return NOT_SUPPORTED;
    *rates = (nvmlUtilization_t){device->gpu->utilization, device->gpu->memory_utilization};
    return OK;
}
ret nvmlDeviceGetTemperature(device_t device, unsigned sensor, unsigned *value) {
    CARD(nvmlDeviceGetTemperature);
    if (sensor) return BAD_ARGUMENT;
    *value = device->gpu->temperature;
    return OK;
}

#define SCALAR(name, type, what) ret name(device_t device, type *value) { CARD(name); *value = device->gpu->what; return OK; }
#define FIXED(name, number) ret name(device_t device, unsigned *value) { CARD(name); *value = number; return OK; }
SCALAR(nvmlDeviceGetPowerUsage, unsigned, power_mw)
SCALAR(nvmlDeviceGetEnforcedPowerLimit, unsigned, power_limit_mw)
SCALAR(nvmlDeviceGetPowerManagementLimit, unsigned, power_limit_mw)
SCALAR(nvmlDeviceGetTotalEnergyConsumption, unsigned long long, energy_mj)
SCALAR(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, reasons)
SCALAR(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, reasons)
SCALAR(nvmlDeviceGetCurrPcieLinkGeneration, unsigned, pcie_generation)
SCALAR(nvmlDeviceGetCurrPcieLinkWidth, unsigned, pcie_width)
SCALAR(nvmlDeviceGetNumFans, unsigned, fans)
SCALAR(nvmlDeviceGetSupportedEventTypes, unsigned long long, event_types)
FIXED(nvmlDeviceGetPerformanceState, 0)
FIXED(nvmlDeviceGetPersistenceMode, 1)
FIXED(nvmlDeviceGetComputeMode, 0)
FIXED(nvmlDeviceGetDisplayActive, 0)
FIXED(nvmlDeviceGetDisplayMode, 0)

ret nvmlDeviceGetClockInfo(device_t device, unsigned kind, unsigned *value) {
    CARD(nvmlDeviceGetClockInfo);
    if (kind > 3) return BAD_ARGUMENT;
    *value = device->gpu->clocks_mhz[kind];
    return OK;
}
ret nvmlDeviceGetMaxClockInfo(device_t device, unsigned kind, unsigned *value) {
    CARD(nvmlDeviceGetMaxClockInfo);
    if (kind > 3) return BAD_ARGUMENT;
    *value = device->gpu->clocks_mhz[kind];
    return OK;
}
ret nvmlDeviceGetTotalEccErrors(device_t device, unsigned kind, unsigned counter, unsigned long long *value) {
    CARD(nvmlDeviceGetTotalEccErrors);
    if (kind > 1 || counter > 1) return BAD_ARGUMENT;
    *value = device->gpu->ecc[kind][counter];
    return OK;
}
ret nvmlDeviceGetRemappedRows(device_t device, unsigned *a, unsigned *b, unsigned *pending, unsigned *failed) {
    CARD(nvmlDeviceGetRemappedRows);
    uint32_t *rows = device->gpu->remapped;
    *a = rows[0], *b = rows[1], *pending = rows[2], *failed = rows[3];
    return OK;
}
ret nvmlDeviceGetFanSpeed(device_t device, unsigned *value) {
    CARD(nvmlDeviceGetFanSpeed);
    if (!device->gpu->fans) return NOT_SUPPORTED;
    *value = device->gpu->fan_percent[0];
    return OK;
}
ret nvmlDeviceGetFanSpeed_v2(device_t device, unsigned fan, unsigned *value) {
    CARD(nvmlDeviceGetFanSpeed_v2);
    if (fan >= device->gpu->fans) return BAD_ARGUMENT;
    *value = device->gpu->fan_percent[fan];
    return OK;
}
ret nvmlDeviceGetEncoderUtilization(device_t device, unsigned *value, unsigned *period) {
    CARD(nvmlDeviceGetEncoderUtilization);
    return *value = 0, *period = 1000, OK;
}
ret nvmlDeviceGetDecoderUtilization(device_t device, unsigned *value, unsigned *period) {
    CARD(nvmlDeviceGetDecoderUtilization);
    return *value = 0, *period = 1000, OK;
}

/* what others ask for, and we don't */
ret nvmlDeviceGetPcieThroughput(device_t device, unsigned counter, unsigned *value) {
    CARD(nvmlDeviceGetPcieThroughput);
    (void)counter;
    return *value = 100, OK;
}
ret nvmlDeviceGetDriverModel(device_t device, unsigned *a, unsigned *b) { CARD(nvmlDeviceGetDriverModel); (void)a, (void)b; return NOT_SUPPORTED; }
ret nvmlDeviceGetDriverModel_v2(device_t device, unsigned *a, unsigned *b) { CARD(nvmlDeviceGetDriverModel_v2); (void)a, (void)b; return NOT_SUPPORTED; }
ret nvmlDeviceGetCudaComputeCapability(device_t device, int *major, int *minor) {
    CARD(nvmlDeviceGetCudaComputeCapability);
    return *major = 8, *minor = 9, OK;
}

static ret field(struct gpu *gpu, nvmlFieldValue_t *at) {
    for (int i = 0; i < MAX_FIELDS; i++)
        if (gpu->fields[i].error && gpu->fields[i].id == at->id) return gpu->fields[i].error;
    at->kind = 3; /* unsigned long long */
    switch (at->id) {
    case 38: at->value.ull = gpu->nvlink_errors[0]; return OK;
    case 52: at->value.ull = gpu->nvlink_errors[1]; return OK;
    case 59: at->value.ull = gpu->nvlink_errors[2]; return OK;
    case 82: at->kind = 1, at->value.u = gpu->memory_temperature; return OK;
    case 83: at->value.ull = gpu->energy_mj; return OK;
    case 94: at->kind = 1, at->value.u = gpu->pcie_replays; return OK;
    case 138: at->value.ull = gpu->nvlink_sent_kib; return OK;
    case 139: at->value.ull = gpu->nvlink_received_kib; return OK;
    case 185: at->kind = 1, at->value.u = gpu->power_average_mw; return OK;
    case 186: at->kind = 1, at->value.u = gpu->power_instant_mw; return OK;
    case 197: at->value.ull = gpu->pcie_sent; return OK;
    case 198: at->value.ull = gpu->pcie_received; return OK;
    case 230: at->kind = 1, at->value.u = gpu->recovery_action; return OK;
    }
    return NOT_SUPPORTED;
}
ret nvmlDeviceGetFieldValues(device_t device, int count, nvmlFieldValue_t *values) {
    CARD(nvmlDeviceGetFieldValues);
    for (int i = 0; i < count; i++) values[i].code = field(device->gpu, &values[i]);
    return OK;
}

/* --- processes */

static ret list(device_t device, unsigned *room, nvmlProcessInfo_v2_t *into, unsigned graphics) {
    struct gpu *gpu = device->gpu;
    unsigned count = 0;
    for (unsigned i = 0; i < gpu->processes; i++) {
        struct process *found = &gpu->process[i];
        if (found->graphics != graphics) continue;
        if (count < *room && into) into[count] = (nvmlProcessInfo_v2_t){found->pid, found->memory, ~0u, ~0u};
        count++;
    }
    ret code = count > *room ? TOO_SMALL : OK;
    *room = count;
    return code;
}
ret nvmlDeviceGetComputeRunningProcesses_v3(device_t device, unsigned *room, nvmlProcessInfo_v2_t *into) {
    CARD(nvmlDeviceGetComputeRunningProcesses_v3);
    return list(device, room, into, 0);
}
ret nvmlDeviceGetGraphicsRunningProcesses_v3(device_t device, unsigned *room, nvmlProcessInfo_v2_t *into) {
    CARD(nvmlDeviceGetGraphicsRunningProcesses_v3);
    return list(device, room, into, 1);
}
ret nvmlDeviceGetProcessUtilization(device_t device, nvmlProcessUtilizationSample_t *into, unsigned *room, unsigned long long since) {
    CARD(nvmlDeviceGetProcessUtilization);
    struct gpu *gpu = device->gpu;
    unsigned count = 0;
    for (unsigned i = 0; i < gpu->processes; i++) {
        struct process *p = &gpu->process[i];
        if (p->stamp_us <= since) continue;
        if (count < *room && into) into[count] = (nvmlProcessUtilizationSample_t){p->pid, p->stamp_us, p->sm, p->mem, p->enc, p->dec};
        count++;
    }
    if (!count) return NOT_FOUND; /* as the real one where nothing ran since */
    ret code = !into || count > *room ? TOO_SMALL : OK;
    *room = count;
    return code;
}

/* --- MIG */

ret nvmlDeviceGetMigMode(device_t device, unsigned *current, unsigned *pending) {
    CARD(nvmlDeviceGetMigMode);
    if (!device->gpu->mig_supported) return NOT_SUPPORTED;
    return *current = *pending = device->gpu->mig_mode, OK;
}
ret nvmlDeviceGetMaxMigDeviceCount(device_t device, unsigned *count) { CARD(nvmlDeviceGetMaxMigDeviceCount); *count = device->gpu->mig_supported ? MAX_MIGS : 0; return OK; }
ret nvmlDeviceGetMigDeviceHandleByIndex(device_t device, unsigned index, device_t *found) {
    CARD(nvmlDeviceGetMigDeviceHandleByIndex);
    if (index >= device->gpu->migs) return NOT_FOUND;
    *found = &mig_devices[device->gpu - state->gpu][index];
    return OK;
}
ret nvmlDeviceGetGpuInstanceId(device_t device, unsigned *id) { CARD(nvmlDeviceGetGpuInstanceId); return device->mig ? (*id = device->mig->instance, OK) : NOT_SUPPORTED; }
ret nvmlDeviceGetComputeInstanceId(device_t device, unsigned *id) { CARD(nvmlDeviceGetComputeInstanceId); return device->mig ? (*id = device->mig->compute, OK) : NOT_SUPPORTED; }
ret nvmlDeviceIsMigDeviceHandle(device_t device, unsigned *is) { CARD(nvmlDeviceIsMigDeviceHandle); *is = device->mig != NULL; return OK; }
ret nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device_t device, device_t *parent) { CARD(nvmlDeviceGetDeviceHandleFromMigDeviceHandle); *parent = &devices[device->gpu - state->gpu]; return OK; }

/* --- events */

ret nvmlEventSetCreate(struct set **made) {
    BEGIN(nvmlEventSetCreate);
    if (!(*made = calloc(1, sizeof **made))) return 20;
    (*made)->read = state->events;
    return OK;
}
ret nvmlDeviceRegisterEvents(device_t device, unsigned long long types, struct set *set) {
    CARD(nvmlDeviceRegisterEvents);
    if (types & ~device->gpu->event_types) return NOT_SUPPORTED;
    set->types[device->gpu - state->gpu] |= types;
    return OK;
}
ret nvmlEventSetFree(struct set *set) { BEGIN(nvmlEventSetFree); free(set); return OK; }
ret nvmlEventSetWait_v2(struct set *set, nvmlEventData_t *into, unsigned timeout_ms) {
    BEGIN(nvmlEventSetWait_v2);
    struct timespec now, end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += timeout_ms / 1000;
    end.tv_nsec += timeout_ms % 1000 * 1000000L;
    for (;;) {
        uint32_t written = __atomic_load_n(&state->events, __ATOMIC_SEQ_CST);
        while (set->read != written) {
            struct event *event = &state->ring[set->read++ % RING];
            if (!(set->types[event->gpu] & event->type)) continue;
            *into = (nvmlEventData_t){&devices[event->gpu], event->type, event->data, ~0u, ~0u};
            return OK;
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
        long long left = (end.tv_sec - now.tv_sec) * 1000000000LL + end.tv_nsec - now.tv_nsec;
        if (left <= 0) return TIMEOUT;
        struct timespec rest = {left / 1000000000LL, left % 1000000000LL};
        syscall(SYS_futex, &state->events, FUTEX_WAIT, written, &rest, NULL, 0);
    }
}
