# The C libraries as other projects find them: by find_package(tinyllama) or pkg-config.

add_library(tinyllama_shared SHARED $<TARGET_OBJECTS:tinyllama_objects>)
add_library(tinyllama::shared ALIAS tinyllama_shared)
add_library(tinyllama::static ALIAS tinyllama_core)
set_target_properties(tinyllama_shared PROPERTIES OUTPUT_NAME tinyllama EXPORT_NAME shared)
if(NOT SKBUILD) # a wheel has no links from name to name
  set_target_properties(tinyllama_shared PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION 0)
endif()
target_include_directories(tinyllama_shared PRIVATE csrc
  INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include>
  $<INSTALL_INTERFACE:${install_prefix}include>)
target_link_libraries(tinyllama_shared PRIVATE Threads::Threads)
target_compile_definitions(tinyllama_shared INTERFACE TINYLLAMA_SHARED)
# Nothing but tl_* can be seen, and nothing else is needed: one file to ship.
if(APPLE)
  target_link_options(tinyllama_shared PRIVATE LINKER:-exported_symbol,_tl_*)
elseif(UNIX)
  set(exports ${PROJECT_SOURCE_DIR}/csrc/exports.map)
  target_link_options(tinyllama_shared PRIVATE LINKER:--version-script=${exports})
  set_target_properties(tinyllama_shared PROPERTIES LINK_DEPENDS ${exports})
  # With a C++ library of its own, all its memory can come from one place. Where there is none to
  # link statically, what that library takes and gives back must not be ours.
  include(CheckCXXSourceCompiles)
  set(CMAKE_REQUIRED_LINK_OPTIONS -static-libstdc++ -static-libgcc)
  check_cxx_source_compiles("#include <string>
int main(int n, char** a) { return std::string(a[n - 1]).empty(); }"
    TINYLLAMA_STATIC_LIBSTDCXX)
  unset(CMAKE_REQUIRED_LINK_OPTIONS)
  if(TINYLLAMA_STATIC_LIBSTDCXX AND NOT TINYLLAMA_SANITIZE)
    target_link_options(tinyllama_shared PRIVATE -static-libstdc++ -static-libgcc)
    target_sources(tinyllama_shared PRIVATE csrc/memory_new.cpp)
  endif()
endif()

include(CMakePackageConfigHelpers)
set(package_folder ${install_prefix}lib/cmake/tinyllama)
install(TARGETS tinyllama_core tinyllama_shared EXPORT tinyllama
  ARCHIVE DESTINATION ${install_prefix}lib
  LIBRARY DESTINATION ${install_prefix}lib
  RUNTIME DESTINATION ${install_prefix}bin)
install(FILES csrc/include/tinyllama.h DESTINATION ${install_prefix}include)
install(EXPORT tinyllama NAMESPACE tinyllama:: FILE tinyllamaTargets.cmake
  DESTINATION ${package_folder})
configure_package_config_file(cmake/tinyllamaConfig.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/tinyllamaConfig.cmake INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/tinyllamaConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
configure_file(cmake/tinyllama.pc.in ${CMAKE_CURRENT_BINARY_DIR}/tinyllama.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/tinyllamaConfig.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/tinyllamaConfigVersion.cmake DESTINATION ${package_folder})
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/tinyllama.pc
  DESTINATION ${install_prefix}lib/pkgconfig)
