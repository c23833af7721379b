/* The Vulkan library that REAL_VULKAN names, counting on the way: compute dispatches, and bytes of the buffers bound to
 * them. It knows programs that bind the buffers of every dispatch by one update of a descriptor template, as ncnn does. */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <vulkan/vulkan.h>

enum { MOST_TEMPLATES = 4096 };

static struct {
    VkDescriptorUpdateTemplate handle;
    uint32_t bindings; /* all of them buffers */
} templates[MOST_TEMPLATES];
static int template_count;
static long long dispatches, bytes;

static PFN_vkGetInstanceProcAddr real_instance;
static PFN_vkGetDeviceProcAddr real_device;
static PFN_vkCmdDispatch real_dispatch;
static PFN_vkCreateDescriptorUpdateTemplateKHR real_create;
static PFN_vkCmdPushDescriptorSetWithTemplateKHR real_push;
static PFN_vkUpdateDescriptorSetWithTemplateKHR real_update;

/* Since the last call: dispatches, then bytes. */
void counted(long long *found) {
    found[0] = dispatches;
    found[1] = bytes;
    dispatches = bytes = 0;
}

static void count_bindings(VkDescriptorUpdateTemplate handle, const void *data) {
    const VkDescriptorBufferInfo *buffers = data;
    for (int i = 0; i < template_count; i++)
        if (templates[i].handle == handle)
            for (uint32_t k = 0; k < templates[i].bindings; k++) bytes += (long long)buffers[k].range;
}

static VKAPI_ATTR void VKAPI_CALL dispatch(VkCommandBuffer commands, uint32_t x, uint32_t y, uint32_t z) {
    dispatches++;
    real_dispatch(commands, x, y, z);
}

static VKAPI_ATTR VkResult VKAPI_CALL create(VkDevice device, const VkDescriptorUpdateTemplateCreateInfo *info,
                                             const VkAllocationCallbacks *allocator,
                                             VkDescriptorUpdateTemplate *handle) {
    VkResult result = real_create(device, info, allocator, handle);
    if (result != VK_SUCCESS) return result;
    if (template_count == MOST_TEMPLATES) abort();
    for (uint32_t i = 0; i < info->descriptorUpdateEntryCount; i++)
        if (info->pDescriptorUpdateEntries[i].descriptorType != VK_DESCRIPTOR_TYPE_STORAGE_BUFFER) abort();
    templates[template_count].handle = *handle;
    templates[template_count++].bindings = info->descriptorUpdateEntryCount;
    return result;
}

static VKAPI_ATTR void VKAPI_CALL push(VkCommandBuffer commands, VkDescriptorUpdateTemplate handle,
                                       VkPipelineLayout layout, uint32_t set, const void *data) {
    count_bindings(handle, data);
    real_push(commands, handle, layout, set, data);
}

static VKAPI_ATTR void VKAPI_CALL update(VkDevice device, VkDescriptorSet set, VkDescriptorUpdateTemplate handle,
                                         const void *data) {
    count_bindings(handle, data);
    real_update(device, set, handle, data);
}

static PFN_vkVoidFunction counting(const char *name, PFN_vkVoidFunction real) {
#define INSTEAD(wanted, keep, function)            \
    if (real && strcmp(name, wanted) == 0) {       \
        keep = (__typeof__(keep))real;             \
        return (PFN_vkVoidFunction)function;       \
    }
    INSTEAD("vkCmdDispatch", real_dispatch, dispatch)
    INSTEAD("vkCreateDescriptorUpdateTemplateKHR", real_create, create)
    INSTEAD("vkCmdPushDescriptorSetWithTemplateKHR", real_push, push)
    INSTEAD("vkUpdateDescriptorSetWithTemplateKHR", real_update, update)
    return real;
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL of_device(VkDevice device, const char *name) {
    return counting(name, real_device(device, name));
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL vkGetInstanceProcAddr(VkInstance instance, const char *name) {
    if (!real_instance) {
        void *library = dlopen(getenv("REAL_VULKAN"), RTLD_NOW);
        real_instance = library ? (PFN_vkGetInstanceProcAddr)dlsym(library, "vkGetInstanceProcAddr") : NULL;
        if (!real_instance) abort();
    }
    if (strcmp(name, "vkGetInstanceProcAddr") == 0) return (PFN_vkVoidFunction)vkGetInstanceProcAddr;
    PFN_vkVoidFunction real = real_instance(instance, name);
    if (real && strcmp(name, "vkGetDeviceProcAddr") == 0) {
        real_device = (PFN_vkGetDeviceProcAddr)real;
        return (PFN_vkVoidFunction)of_device;
    }
    return counting(name, real);
}
