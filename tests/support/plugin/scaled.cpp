// A plugin for the tests: Scaled, which multiplies a tensor of float32 by its attribute `factor`.
//
// TensorRT's wheels bring no headers, so what the plugin needs of its binary interface is declared here: classes with
// these virtual functions in this order, as "IPluginV3" in TensorRT's documentation has them. The kernel is PTX, which
// the driver compiles, and the driver is looked up when it is needed: this builds and loads on machines without a GPU.

#include <cstdint>
#include <cstring>
#include <dlfcn.h>

namespace api {

enum class DataType : int32_t { kFLOAT = 0 };

struct Dims {
    int32_t count;
    int64_t sizes[8];
};

struct InterfaceInfo {
    char const* kind;
    int32_t major;
    int32_t minor;
};

struct TensorDesc {
    Dims dims;
    DataType type;
    int32_t format;
    float scale;
};

struct DynamicTensorDesc {
    TensorDesc desc;
    Dims min, max, opt;
};

struct DimsExprs {
    int32_t count;
    void const* sizes[8];
};

struct Field {
    char const* name;
    void const* data;
    int32_t type;
    int32_t length;
};

constexpr int32_t kFLOAT32_FIELD = 1;
constexpr int32_t kLINEAR = 0;

struct Fields {
    int32_t count;
    Field const* fields;
};

class Versioned {
public:
    virtual int32_t getAPILanguage() const noexcept { return 0; }
    virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
    virtual ~Versioned() noexcept = default;
};

class Plugin : public Versioned {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
    virtual Versioned* getCapabilityInterface(int32_t type) noexcept = 0;
    virtual Plugin* clone() noexcept = 0;
};

class Core : public Versioned {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
    virtual char const* getPluginName() const noexcept = 0;
    virtual char const* getPluginVersion() const noexcept = 0;
    virtual char const* getPluginNamespace() const noexcept = 0;
};

class Build : public Versioned {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
    virtual int32_t configurePlugin(DynamicTensorDesc const*, int32_t, DynamicTensorDesc const*, int32_t) noexcept = 0;
    virtual int32_t getOutputDataTypes(DataType*, int32_t, DataType const*, int32_t) const noexcept = 0;
    virtual int32_t getOutputShapes(
        DimsExprs const*, int32_t, DimsExprs const*, int32_t, DimsExprs*, int32_t, void*) noexcept = 0;
    virtual bool supportsFormatCombination(int32_t, DynamicTensorDesc const*, int32_t, int32_t) noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual size_t getWorkspaceSize(
        DynamicTensorDesc const*, int32_t, DynamicTensorDesc const*, int32_t) const noexcept { return 0; }
    virtual int32_t getValidTactics(int32_t*, int32_t) noexcept { return 0; }
    virtual int32_t getNbTactics() noexcept { return 0; }
    virtual char const* getTimingCacheID() noexcept { return nullptr; }
    virtual int32_t getFormatCombinationLimit() noexcept { return 100; }
    virtual char const* getMetadataString() noexcept { return nullptr; }
};

class Runtime : public Versioned {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
    virtual int32_t setTactic(int32_t) noexcept { return 0; }
    virtual int32_t onShapeChange(TensorDesc const*, int32_t, TensorDesc const*, int32_t) noexcept = 0;
    virtual int32_t enqueue(
        TensorDesc const*, TensorDesc const*, void const* const*, void* const*, void*, void*) noexcept = 0;
    virtual Plugin* attachToContext(void*) noexcept = 0;
    virtual Fields const* getFieldsToSerialize() noexcept = 0;
};

class Creator : public Versioned {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
    virtual Plugin* createPlugin(char const*, Fields const*, int32_t) noexcept = 0;
    virtual Fields const* getFieldNames() noexcept = 0;
    virtual char const* getPluginName() const noexcept = 0;
    virtual char const* getPluginVersion() const noexcept = 0;
    virtual char const* getPluginNamespace() const noexcept = 0;
};

}  // namespace api

namespace {

constexpr char const* kNAME = "Scaled";
constexpr char const* kVERSION = "1";
constexpr char const* kNAMESPACE = "";

constexpr char const* kKERNEL = R"(
.version 7.0
.target sm_75
.address_size 64
.visible .entry scaled(.param .u64 to, .param .u64 from, .param .f32 factor, .param .u64 count)
{
    .reg .pred %p<2>;
    .reg .f32 %f<4>;
    .reg .b32 %r<5>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [to];
    ld.param.u64 %rd2, [from];
    ld.param.f32 %f1, [factor];
    ld.param.u64 %rd3, [count];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mul.wide.u32 %rd4, %r1, %r2;
    cvt.u64.u32 %rd5, %r3;
    add.s64 %rd6, %rd4, %rd5;
    setp.ge.u64 %p1, %rd6, %rd3;
    @%p1 bra DONE;
    shl.b64 %rd7, %rd6, 2;
    add.s64 %rd8, %rd2, %rd7;
    ld.global.f32 %f2, [%rd8];
    mul.f32 %f3, %f2, %f1;
    add.s64 %rd8, %rd1, %rd7;
    st.global.f32 [%rd8], %f3;
DONE:
    ret;
}
)";

// What it takes of the driver's API; 0 where all went well.
int32_t launch(void* to, void const* from, float factor, uint64_t count, void* stream)
{
    using Load = int (*)(void**, void const*);
    using Get = int (*)(void**, void*, char const*);
    using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
        void**);
    static void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (driver == nullptr) {
        return 1;
    }
    static auto const run = reinterpret_cast<Launch>(dlsym(driver, "cuLaunchKernel"));
    static void* const kernel = [] {
        void *module = nullptr, *function = nullptr;
        reinterpret_cast<Load>(dlsym(driver, "cuModuleLoadData"))(&module, kKERNEL);
        reinterpret_cast<Get>(dlsym(driver, "cuModuleGetFunction"))(&function, module, "scaled");
        return function;
    }();
    if (count == 0) {
        return 0;
    }
    void* arguments[] = {&to, &from, &factor, &count};
    return run(kernel, static_cast<unsigned>((count + 255) / 256), 1, 1, 256, 1, 1, 0, stream, arguments, nullptr);
}

class Scaled final : public api::Plugin, public api::Core, public api::Build, public api::Runtime {
public:
    explicit Scaled(float factor) : mFactor{factor} {}

    api::Versioned* getCapabilityInterface(int32_t type) noexcept override
    {
        switch (type) {
        case 0: return static_cast<api::Core*>(this);
        case 1: return static_cast<api::Build*>(this);
        case 2: return static_cast<api::Runtime*>(this);
        default: return nullptr;
        }
    }
    api::Plugin* clone() noexcept override { return new Scaled{mFactor}; }

    char const* getPluginName() const noexcept override { return kNAME; }
    char const* getPluginVersion() const noexcept override { return kVERSION; }
    char const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

    int32_t configurePlugin(
        api::DynamicTensorDesc const*, int32_t, api::DynamicTensorDesc const*, int32_t) noexcept override { return 0; }
    int32_t getOutputDataTypes(
        api::DataType* outputs, int32_t, api::DataType const* inputs, int32_t) const noexcept override
    {
        outputs[0] = inputs[0];
        return 0;
    }
    int32_t getOutputShapes(api::DimsExprs const* inputs, int32_t, api::DimsExprs const*, int32_t,
        api::DimsExprs* outputs, int32_t, void*) noexcept override
    {
        outputs[0] = inputs[0];
        return 0;
    }
    bool supportsFormatCombination(
        int32_t position, api::DynamicTensorDesc const* tensors, int32_t, int32_t) noexcept override
    {
        return tensors[position].desc.format == api::kLINEAR && tensors[position].desc.type == api::DataType::kFLOAT;
    }
    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t onShapeChange(api::TensorDesc const*, int32_t, api::TensorDesc const*, int32_t) noexcept override
    {
        return 0;
    }
    int32_t enqueue(api::TensorDesc const* inputs, api::TensorDesc const*, void const* const* from, void* const* to,
        void*, void* stream) noexcept override
    {
        uint64_t count = 1;
        for (int32_t axis = 0; axis < inputs[0].dims.count; ++axis) {
            count *= static_cast<uint64_t>(inputs[0].dims.sizes[axis]);
        }
        return launch(to[0], from[0], mFactor, count, stream);
    }
    api::Plugin* attachToContext(void*) noexcept override { return clone(); }
    api::Fields const* getFieldsToSerialize() noexcept override
    {
        mField = {"factor", &mFactor, api::kFLOAT32_FIELD, 1};
        mFields = {1, &mField};
        return &mFields;
    }

private:
    float mFactor;
    api::Field mField{};
    api::Fields mFields{};
};

class ScaledCreator final : public api::Creator {
public:
    api::Plugin* createPlugin(char const*, api::Fields const* given, int32_t) noexcept override
    {
        float factor = 1;
        for (int32_t i = 0; i < given->count; ++i) {
            if (std::strcmp(given->fields[i].name, "factor") == 0) {
                factor = *static_cast<float const*>(given->fields[i].data);
            }
        }
        return new Scaled{factor};
    }
    api::Fields const* getFieldNames() noexcept override { return &mFields; }
    char const* getPluginName() const noexcept override { return kNAME; }
    char const* getPluginVersion() const noexcept override { return kVERSION; }
    char const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

private:
    api::Field mField{"factor", nullptr, api::kFLOAT32_FIELD, 1};
    api::Fields mFields{1, &mField};
};

}  // namespace

extern "C" __attribute__((visibility("default"))) api::Versioned* const* getCreators(int32_t& count)
{
    static ScaledCreator creator;
    static api::Versioned* const creators[] = {&creator};
    count = 1;
    return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(void*) {}
