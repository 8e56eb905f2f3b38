// Generated from sql/migrations by `make types`: do not edit. Copy it into your app as it is.

export type Json = string | number | boolean | null | { [key: string]: Json | undefined } | Json[]

export type Database = {
  public: {
    Tables: {
      cost_records: {
        Row: {
          amount: number
          billing_period: string
          cost_type: string
          details: Json | null
          id: string
          job_id: string | null
          recorded_at: string | null
          user_id: string
        }
        ComputedFields: never
        Insert: {
          amount: number
          billing_period: string
          cost_type: string
          details?: Json | null
          id?: string
          job_id?: string | null
          recorded_at?: string | null
          user_id: string
        }
        Update: {
          amount?: number
          billing_period?: string
          cost_type?: string
          details?: Json | null
          id?: string
          job_id?: string | null
          recorded_at?: string | null
          user_id?: string
        }
        Relationships: [
          {
            foreignKeyName: 'cost_records_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_job_status'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'cost_records_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_jobs'
            referencedColumns: ['id']
          },
          {
            foreignKeyName: 'cost_records_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_orphans'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'cost_records_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_queue'
            referencedColumns: ['job_id']
          },
        ]
      }
      datasets: {
        Row: {
          avg_tokens_per_turn: number | null
          avg_turns_per_conversation: number | null
          created_at: string | null
          deleted_at: string | null
          description: string | null
          error_message: string | null
          file_name: string
          file_size: number
          format: string | null
          id: string
          name: string
          sample_data: Json | null
          status: string | null
          storage_bucket: string | null
          storage_path: string
          total_tokens: number | null
          total_training_pairs: number | null
          total_validation_pairs: number | null
          training_ready: boolean | null
          updated_at: string | null
          user_id: string
          validated_at: string | null
          validation_errors: Json | null
        }
        ComputedFields: never
        Insert: {
          avg_tokens_per_turn?: number | null
          avg_turns_per_conversation?: number | null
          created_at?: string | null
          deleted_at?: string | null
          description?: string | null
          error_message?: string | null
          file_name: string
          file_size: number
          format?: string | null
          id?: string
          name: string
          sample_data?: Json | null
          status?: string | null
          storage_bucket?: string | null
          storage_path: string
          total_tokens?: number | null
          total_training_pairs?: number | null
          total_validation_pairs?: number | null
          training_ready?: boolean | null
          updated_at?: string | null
          user_id: string
          validated_at?: string | null
          validation_errors?: Json | null
        }
        Update: {
          avg_tokens_per_turn?: number | null
          avg_turns_per_conversation?: number | null
          created_at?: string | null
          deleted_at?: string | null
          description?: string | null
          error_message?: string | null
          file_name?: string
          file_size?: number
          format?: string | null
          id?: string
          name?: string
          sample_data?: Json | null
          status?: string | null
          storage_bucket?: string | null
          storage_path?: string
          total_tokens?: number | null
          total_training_pairs?: number | null
          total_validation_pairs?: number | null
          training_ready?: boolean | null
          updated_at?: string | null
          user_id?: string
          validated_at?: string | null
          validation_errors?: Json | null
        }
        Relationships: []
      }
      metrics_points: {
        Row: {
          epoch: number
          gpu_utilization: number | null
          gradient_norm: number | null
          id: string
          job_id: string
          learning_rate: number
          step: number
          throughput: number | null
          timestamp: string | null
          training_loss: number
          validation_loss: number | null
        }
        ComputedFields: never
        Insert: {
          epoch: number
          gpu_utilization?: number | null
          gradient_norm?: number | null
          id?: string
          job_id: string
          learning_rate: number
          step: number
          throughput?: number | null
          timestamp?: string | null
          training_loss: number
          validation_loss?: number | null
        }
        Update: {
          epoch?: number
          gpu_utilization?: number | null
          gradient_norm?: number | null
          id?: string
          job_id?: string
          learning_rate?: number
          step?: number
          throughput?: number | null
          timestamp?: string | null
          training_loss?: number
          validation_loss?: number | null
        }
        Relationships: [
          {
            foreignKeyName: 'metrics_points_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_job_status'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'metrics_points_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_jobs'
            referencedColumns: ['id']
          },
          {
            foreignKeyName: 'metrics_points_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_orphans'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'metrics_points_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_queue'
            referencedColumns: ['job_id']
          },
        ]
      }
      model_artifacts: {
        Row: {
          artifacts: NonNullable<Json>
          configuration: NonNullable<Json>
          created_at: string | null
          dataset_id: string
          deleted_at: string | null
          deployed_at: string | null
          description: string | null
          id: string
          job_id: string
          name: string
          parent_model_id: string | null
          quality_metrics: NonNullable<Json>
          status: string | null
          training_summary: NonNullable<Json>
          updated_at: string | null
          user_id: string
          version: string | null
        }
        ComputedFields: never
        Insert: {
          artifacts: NonNullable<Json>
          configuration: NonNullable<Json>
          created_at?: string | null
          dataset_id: string
          deleted_at?: string | null
          deployed_at?: string | null
          description?: string | null
          id?: string
          job_id: string
          name: string
          parent_model_id?: string | null
          quality_metrics: NonNullable<Json>
          status?: string | null
          training_summary: NonNullable<Json>
          updated_at?: string | null
          user_id: string
          version?: string | null
        }
        Update: {
          artifacts?: NonNullable<Json>
          configuration?: NonNullable<Json>
          created_at?: string | null
          dataset_id?: string
          deleted_at?: string | null
          deployed_at?: string | null
          description?: string | null
          id?: string
          job_id?: string
          name?: string
          parent_model_id?: string | null
          quality_metrics?: NonNullable<Json>
          status?: string | null
          training_summary?: NonNullable<Json>
          updated_at?: string | null
          user_id?: string
          version?: string | null
        }
        Relationships: [
          {
            foreignKeyName: 'model_artifacts_dataset_id_fkey'
            columns: ['dataset_id']
            isOneToOne: false
            referencedRelation: 'datasets'
            referencedColumns: ['id']
          },
          {
            foreignKeyName: 'model_artifacts_job_id_fkey'
            columns: ['job_id']
            isOneToOne: true
            referencedRelation: 'training_job_status'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'model_artifacts_job_id_fkey'
            columns: ['job_id']
            isOneToOne: true
            referencedRelation: 'training_jobs'
            referencedColumns: ['id']
          },
          {
            foreignKeyName: 'model_artifacts_job_id_fkey'
            columns: ['job_id']
            isOneToOne: true
            referencedRelation: 'training_orphans'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'model_artifacts_job_id_fkey'
            columns: ['job_id']
            isOneToOne: true
            referencedRelation: 'training_queue'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'model_artifacts_parent_model_id_fkey'
            columns: ['parent_model_id']
            isOneToOne: false
            referencedRelation: 'model_artifacts'
            referencedColumns: ['id']
          },
        ]
      }
      notifications: {
        Row: {
          action_url: string | null
          created_at: string | null
          id: string
          message: string
          metadata: Json | null
          priority: string | null
          read: boolean | null
          title: string
          type: string
          user_id: string
        }
        ComputedFields: never
        Insert: {
          action_url?: string | null
          created_at?: string | null
          id?: string
          message: string
          metadata?: Json | null
          priority?: string | null
          read?: boolean | null
          title: string
          type: string
          user_id: string
        }
        Update: {
          action_url?: string | null
          created_at?: string | null
          id?: string
          message?: string
          metadata?: Json | null
          priority?: string | null
          read?: boolean | null
          title?: string
          type?: string
          user_id?: string
        }
        Relationships: []
      }
      training_callbacks: {
        Row: {
          attempts: number
          created_at: string
          delivered_at: string | null
          event: string
          host: string
          id: string
          job_id: string
          last_error: string | null
          last_status: number | null
          lock_token: string | null
          locked_until: string | null
          next_at: string
          payload: NonNullable<Json>
          sequence: number
          state: string
          url: string
          user_id: string
        }
        ComputedFields: never
        Insert: {
          attempts?: number
          created_at?: string
          delivered_at?: string | null
          event: string
          host: string
          id?: string
          job_id: string
          last_error?: string | null
          last_status?: number | null
          lock_token?: string | null
          locked_until?: string | null
          next_at?: string
          payload: NonNullable<Json>
          sequence?: number
          state?: string
          url: string
          user_id: string
        }
        Update: {
          attempts?: number
          created_at?: string
          delivered_at?: string | null
          event?: string
          host?: string
          id?: string
          job_id?: string
          last_error?: string | null
          last_status?: number | null
          lock_token?: string | null
          locked_until?: string | null
          next_at?: string
          payload?: NonNullable<Json>
          sequence?: number
          state?: string
          url?: string
          user_id?: string
        }
        Relationships: [
          {
            foreignKeyName: 'training_callbacks_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_job_status'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'training_callbacks_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_jobs'
            referencedColumns: ['id']
          },
          {
            foreignKeyName: 'training_callbacks_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_orphans'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'training_callbacks_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_queue'
            referencedColumns: ['job_id']
          },
        ]
      }
      training_comparison_answers: {
        Row: {
          answers: NonNullable<Json>
          comparison_id: string
          number: number
          reference: string | null
          turns: NonNullable<Json>
        }
        ComputedFields: never
        Insert: {
          answers: NonNullable<Json>
          comparison_id: string
          number: number
          reference?: string | null
          turns: NonNullable<Json>
        }
        Update: {
          answers?: NonNullable<Json>
          comparison_id?: string
          number?: number
          reference?: string | null
          turns?: NonNullable<Json>
        }
        Relationships: [
          {
            foreignKeyName: 'training_comparison_answers_comparison_id_fkey'
            columns: ['comparison_id']
            isOneToOne: false
            referencedRelation: 'training_comparisons'
            referencedColumns: ['id']
          },
        ]
      }
      training_comparisons: {
        Row: {
          base_model: string
          contestants: NonNullable<Json>
          created_at: string
          held_out: NonNullable<Json>
          id: string
          notes: NonNullable<Json>
          options: NonNullable<Json>
          prompts_are_held_out: boolean
          user_id: string
        }
        ComputedFields: never
        Insert: {
          base_model: string
          contestants: NonNullable<Json>
          created_at?: string
          held_out: NonNullable<Json>
          id?: string
          notes: NonNullable<Json>
          options: NonNullable<Json>
          prompts_are_held_out: boolean
          user_id: string
        }
        Update: {
          base_model?: string
          contestants?: NonNullable<Json>
          created_at?: string
          held_out?: NonNullable<Json>
          id?: string
          notes?: NonNullable<Json>
          options?: NonNullable<Json>
          prompts_are_held_out?: boolean
          user_id?: string
        }
        Relationships: []
      }
      training_deliveries: {
        Row: {
          attempts: number
          claims: number
          created_at: string
          error_code: string | null
          error_hint: string | null
          error_message: string | null
          finished_at: string | null
          first_worker: string | null
          id: string
          job_id: string
          kind: string
          lock_token: string | null
          locked_until: string | null
          next_at: string
          result: Json | null
          started_at: string | null
          state: string
          storage: string | null
          target: string
          user_id: string
          worker_id: string | null
        }
        ComputedFields: never
        Insert: {
          attempts?: number
          claims?: number
          created_at?: string
          error_code?: string | null
          error_hint?: string | null
          error_message?: string | null
          finished_at?: string | null
          first_worker?: string | null
          id?: string
          job_id: string
          kind: string
          lock_token?: string | null
          locked_until?: string | null
          next_at?: string
          result?: Json | null
          started_at?: string | null
          state?: string
          storage?: string | null
          target?: string
          user_id: string
          worker_id?: string | null
        }
        Update: {
          attempts?: number
          claims?: number
          created_at?: string
          error_code?: string | null
          error_hint?: string | null
          error_message?: string | null
          finished_at?: string | null
          first_worker?: string | null
          id?: string
          job_id?: string
          kind?: string
          lock_token?: string | null
          locked_until?: string | null
          next_at?: string
          result?: Json | null
          started_at?: string | null
          state?: string
          storage?: string | null
          target?: string
          user_id?: string
          worker_id?: string | null
        }
        Relationships: [
          {
            foreignKeyName: 'training_deliveries_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_job_status'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'training_deliveries_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_jobs'
            referencedColumns: ['id']
          },
          {
            foreignKeyName: 'training_deliveries_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_orphans'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'training_deliveries_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_queue'
            referencedColumns: ['job_id']
          },
        ]
      }
      training_events: {
        Row: {
          at: string
          data: NonNullable<Json>
          epoch: number
          id: number
          job_id: string
          kind: string
          message: string
        }
        ComputedFields: never
        Insert: {
          at?: string
          data?: NonNullable<Json>
          epoch?: number
          id?: never
          job_id: string
          kind: string
          message?: string
        }
        Update: {
          at?: string
          data?: NonNullable<Json>
          epoch?: number
          id?: never
          job_id?: string
          kind?: string
          message?: string
        }
        Relationships: [
          {
            foreignKeyName: 'training_events_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_job_status'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'training_events_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_jobs'
            referencedColumns: ['id']
          },
          {
            foreignKeyName: 'training_events_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_orphans'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'training_events_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_queue'
            referencedColumns: ['job_id']
          },
        ]
      }
      training_fleet_decisions: {
        Row: {
          at: string
          decision: string
          gpu_type: string | null
          id: number
          pod: string | null
          pod_row: string | null
          reason: string
        }
        ComputedFields: never
        Insert: {
          at: string
          decision: string
          gpu_type?: string | null
          id?: never
          pod?: string | null
          pod_row?: string | null
          reason: string
        }
        Update: {
          at?: string
          decision?: string
          gpu_type?: string | null
          id?: never
          pod?: string | null
          pod_row?: string | null
          reason?: string
        }
        Relationships: [
          {
            foreignKeyName: 'training_fleet_decisions_pod_row_fkey'
            columns: ['pod_row']
            isOneToOne: false
            referencedRelation: 'training_pods'
            referencedColumns: ['id']
          },
        ]
      }
      training_jobs: {
        Row: {
          adapter_bytes: number | null
          adapter_path: string | null
          adapter_sha256: string | null
          artifact_id: string | null
          attempt: number
          base_model: string | null
          callback_url: string | null
          client_job_id: string | null
          completed_at: string | null
          created_at: string | null
          current_cost: number | null
          current_epoch: number | null
          current_metrics: Json | null
          current_stage: string | null
          current_step: number | null
          dataset_id: string
          dataset_url: string | null
          deadline_at: string | null
          deployed_as: string | null
          deployed_at: string | null
          deployment_note: string | null
          due: boolean
          error_code: string | null
          error_hint: string | null
          error_message: string | null
          error_stack: string | null
          estimated_completion_at: string | null
          estimated_total_cost: number
          external_job_id: string | null
          final_cost: number | null
          gpu_config: NonNullable<Json>
          held: boolean
          hyperparameters: NonNullable<Json>
          id: string
          last_progress_at: string | null
          lease_epoch: number
          lease_token: string | null
          max_attempts: number
          max_cost: number | null
          need_gpu_memory_gb: number | null
          need_gpu_type: string | null
          need_gpus: number
          preset_id: string
          priority: number
          progress: number | null
          queued_at: string | null
          result: Json | null
          retry_count: number | null
          run_after: string | null
          started_at: string | null
          status: string | null
          total_epochs: number
          total_steps: number | null
          trained_with: Json | null
          updated_at: string | null
          user_id: string
          training_held_seconds: number | null
          training_status_json: Json | null
        }
        ComputedFields: 'training_held_seconds' | 'training_status_json'
        Insert: {
          adapter_bytes?: number | null
          adapter_path?: string | null
          adapter_sha256?: string | null
          artifact_id?: string | null
          attempt?: number
          base_model?: string | null
          callback_url?: string | null
          client_job_id?: string | null
          completed_at?: string | null
          created_at?: string | null
          current_cost?: number | null
          current_epoch?: number | null
          current_metrics?: Json | null
          current_stage?: string | null
          current_step?: number | null
          dataset_id: string
          dataset_url?: string | null
          deadline_at?: string | null
          deployed_as?: string | null
          deployed_at?: string | null
          deployment_note?: string | null
          due?: boolean
          error_code?: string | null
          error_hint?: string | null
          error_message?: string | null
          error_stack?: string | null
          estimated_completion_at?: string | null
          estimated_total_cost?: number
          external_job_id?: string | null
          final_cost?: number | null
          gpu_config?: NonNullable<Json>
          held?: boolean
          hyperparameters?: NonNullable<Json>
          id?: string
          last_progress_at?: string | null
          lease_epoch?: number
          lease_token?: string | null
          max_attempts?: number
          max_cost?: number | null
          need_gpu_memory_gb?: number | null
          need_gpu_type?: string | null
          need_gpus?: number
          preset_id?: string
          priority?: number
          progress?: number | null
          queued_at?: string | null
          result?: Json | null
          retry_count?: number | null
          run_after?: string | null
          started_at?: string | null
          status?: string | null
          total_epochs?: number
          total_steps?: number | null
          trained_with?: Json | null
          updated_at?: string | null
          user_id: string
        }
        Update: {
          adapter_bytes?: number | null
          adapter_path?: string | null
          adapter_sha256?: string | null
          artifact_id?: string | null
          attempt?: number
          base_model?: string | null
          callback_url?: string | null
          client_job_id?: string | null
          completed_at?: string | null
          created_at?: string | null
          current_cost?: number | null
          current_epoch?: number | null
          current_metrics?: Json | null
          current_stage?: string | null
          current_step?: number | null
          dataset_id?: string
          dataset_url?: string | null
          deadline_at?: string | null
          deployed_as?: string | null
          deployed_at?: string | null
          deployment_note?: string | null
          due?: boolean
          error_code?: string | null
          error_hint?: string | null
          error_message?: string | null
          error_stack?: string | null
          estimated_completion_at?: string | null
          estimated_total_cost?: number
          external_job_id?: string | null
          final_cost?: number | null
          gpu_config?: NonNullable<Json>
          held?: boolean
          hyperparameters?: NonNullable<Json>
          id?: string
          last_progress_at?: string | null
          lease_epoch?: number
          lease_token?: string | null
          max_attempts?: number
          max_cost?: number | null
          need_gpu_memory_gb?: number | null
          need_gpu_type?: string | null
          need_gpus?: number
          preset_id?: string
          priority?: number
          progress?: number | null
          queued_at?: string | null
          result?: Json | null
          retry_count?: number | null
          run_after?: string | null
          started_at?: string | null
          status?: string | null
          total_epochs?: number
          total_steps?: number | null
          trained_with?: Json | null
          updated_at?: string | null
          user_id?: string
        }
        Relationships: [
          {
            foreignKeyName: 'training_jobs_artifact_id_fkey'
            columns: ['artifact_id']
            isOneToOne: false
            referencedRelation: 'model_artifacts'
            referencedColumns: ['id']
          },
          {
            foreignKeyName: 'training_jobs_dataset_id_fkey'
            columns: ['dataset_id']
            isOneToOne: false
            referencedRelation: 'datasets'
            referencedColumns: ['id']
          },
        ]
      }
      training_leases: {
        Row: {
          claimed_at: string
          epoch: number
          expires_at: string
          heartbeat_at: string
          job_id: string
          token: string
          user_id: string
          user_slot: number | null
          worker_id: string
        }
        ComputedFields: never
        Insert: {
          claimed_at?: string
          epoch: number
          expires_at: string
          heartbeat_at?: string
          job_id: string
          token?: string
          user_id: string
          user_slot?: number | null
          worker_id: string
        }
        Update: {
          claimed_at?: string
          epoch?: number
          expires_at?: string
          heartbeat_at?: string
          job_id?: string
          token?: string
          user_id?: string
          user_slot?: number | null
          worker_id?: string
        }
        Relationships: [
          {
            foreignKeyName: 'training_leases_job_id_fkey'
            columns: ['job_id']
            isOneToOne: true
            referencedRelation: 'training_job_status'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'training_leases_job_id_fkey'
            columns: ['job_id']
            isOneToOne: true
            referencedRelation: 'training_jobs'
            referencedColumns: ['id']
          },
          {
            foreignKeyName: 'training_leases_job_id_fkey'
            columns: ['job_id']
            isOneToOne: true
            referencedRelation: 'training_orphans'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'training_leases_job_id_fkey'
            columns: ['job_id']
            isOneToOne: true
            referencedRelation: 'training_queue'
            referencedColumns: ['job_id']
          },
        ]
      }
      training_pods: {
        Row: {
          asked_at: string
          doom: string | null
          doomed_at: string | null
          ended_at: string | null
          ending: string | null
          gpu_count: number
          gpu_type: string
          id: string
          idle_since: string | null
          pod: string | null
          price_per_hour: number | null
          reported_at: string | null
          slot: number
        }
        ComputedFields: never
        Insert: {
          asked_at: string
          doom?: string | null
          doomed_at?: string | null
          ended_at?: string | null
          ending?: string | null
          gpu_count: number
          gpu_type: string
          id?: string
          idle_since?: string | null
          pod?: string | null
          price_per_hour?: number | null
          reported_at?: string | null
          slot: number
        }
        Update: {
          asked_at?: string
          doom?: string | null
          doomed_at?: string | null
          ended_at?: string | null
          ending?: string | null
          gpu_count?: number
          gpu_type?: string
          id?: string
          idle_since?: string | null
          pod?: string | null
          price_per_hour?: number | null
          reported_at?: string | null
          slot?: number
        }
        Relationships: []
      }
      training_served_names: {
        Row: {
          completed_at: string
          endpoint: string
          job_id: string
          name: string
          superseded: string[]
          taken_at: string
          user_id: string
        }
        ComputedFields: never
        Insert: {
          completed_at: string
          endpoint: string
          job_id: string
          name: string
          superseded?: string[]
          taken_at?: string
          user_id: string
        }
        Update: {
          completed_at?: string
          endpoint?: string
          job_id?: string
          name?: string
          superseded?: string[]
          taken_at?: string
          user_id?: string
        }
        Relationships: [
          {
            foreignKeyName: 'training_served_names_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_job_status'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'training_served_names_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_jobs'
            referencedColumns: ['id']
          },
          {
            foreignKeyName: 'training_served_names_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_orphans'
            referencedColumns: ['job_id']
          },
          {
            foreignKeyName: 'training_served_names_job_id_fkey'
            columns: ['job_id']
            isOneToOne: false
            referencedRelation: 'training_queue'
            referencedColumns: ['job_id']
          },
        ]
      }
      training_uploads: {
        Row: {
          bucket: string
          bytes: number | null
          epoch: number
          job_id: string
          kind: string
          manifest_sha256: string | null
          noted_at: string
          objects: string[]
          step: number
          storage: string
        }
        ComputedFields: never
        Insert: {
          bucket: string
          bytes?: number | null
          epoch: number
          job_id: string
          kind: string
          manifest_sha256?: string | null
          noted_at?: string
          objects: string[]
          step?: number
          storage: string
        }
        Update: {
          bucket?: string
          bytes?: number | null
          epoch?: number
          job_id?: string
          kind?: string
          manifest_sha256?: string | null
          noted_at?: string
          objects?: string[]
          step?: number
          storage?: string
        }
        Relationships: []
      }
      training_votes: {
        Row: {
          choice: string | null
          comparison_id: string
          kind: string
          number: number
          one: number
          said: Json | null
          shown_at: string
          turned: boolean
          two: number
          voted_at: string | null
          voter: string
          voter_key: string
        }
        ComputedFields: never
        Insert: {
          choice?: string | null
          comparison_id: string
          kind: string
          number: number
          one: number
          said?: Json | null
          shown_at?: string
          turned: boolean
          two: number
          voted_at?: string | null
          voter: string
          voter_key?: string
        }
        Update: {
          choice?: string | null
          comparison_id?: string
          kind?: string
          number?: number
          one?: number
          said?: Json | null
          shown_at?: string
          turned?: boolean
          two?: number
          voted_at?: string | null
          voter?: string
          voter_key?: string
        }
        Relationships: [
          {
            foreignKeyName: 'training_votes_of_an_answer'
            columns: ['comparison_id', 'number']
            isOneToOne: false
            referencedRelation: 'training_comparison_answers'
            referencedColumns: ['comparison_id', 'number']
          },
        ]
      }
      training_workers: {
        Row: {
          busy: number
          data: NonNullable<Json>
          device: string
          drain: boolean
          gpu_count: number
          gpu_memory_gb: number | null
          gpu_type: string | null
          gpus: NonNullable<Json>
          host: string
          id: string
          last_seen_at: string
          models: string[] | null
          pod: string | null
          slots: number
          started_at: string
          state: string
          user_cap: number | null
          versions: NonNullable<Json>
        }
        ComputedFields: never
        Insert: {
          busy?: number
          data?: NonNullable<Json>
          device: string
          drain?: boolean
          gpu_count?: number
          gpu_memory_gb?: number | null
          gpu_type?: string | null
          gpus?: NonNullable<Json>
          host: string
          id: string
          last_seen_at?: string
          models?: string[] | null
          pod?: string | null
          slots?: number
          started_at?: string
          state?: string
          user_cap?: number | null
          versions?: NonNullable<Json>
        }
        Update: {
          busy?: number
          data?: NonNullable<Json>
          device?: string
          drain?: boolean
          gpu_count?: number
          gpu_memory_gb?: number | null
          gpu_type?: string | null
          gpus?: NonNullable<Json>
          host?: string
          id?: string
          last_seen_at?: string
          models?: string[] | null
          pod?: string | null
          slots?: number
          started_at?: string
          state?: string
          user_cap?: number | null
          versions?: NonNullable<Json>
        }
        Relationships: []
      }
    }
    Views: {
      training_job_status: {
        Row: {
          adapter_path: string | null
          attempt: number
          completed_at: string | null
          contract: Json | null
          cost: number | null
          current_epoch: number | null
          current_step: number | null
          error_code: string | null
          error_hint: string | null
          error_message: string | null
          estimated_completion_at: string | null
          job_id: string
          last_progress_at: string | null
          lease_expires_at: string | null
          max_attempts: number
          metrics: Json | null
          progress: number | null
          queued_at: string | null
          stage: string | null
          started_at: string | null
          state: string | null
          total_steps: number | null
          user_id: string
        }
        ComputedFields: never
        Relationships: []
      }
      training_live_workers: {
        Row: {
          busy: number
          device: string
          gpu_count: number
          gpu_memory_gb: number | null
          gpu_type: string | null
          id: string
          models: string[] | null
          slots: number
          state: string
          user_cap: number | null
        }
        ComputedFields: never
        Insert: {
          busy?: number | null
          device?: string | null
          gpu_count?: number | null
          gpu_memory_gb?: number | null
          gpu_type?: string | null
          id?: string | null
          models?: string[] | null
          slots?: number | null
          state?: string | null
          user_cap?: number | null
        }
        Update: {
          busy?: number | null
          device?: string | null
          gpu_count?: number | null
          gpu_memory_gb?: number | null
          gpu_type?: string | null
          id?: string | null
          models?: string[] | null
          slots?: number | null
          state?: string | null
          user_cap?: number | null
        }
        Relationships: []
      }
      training_orphans: {
        Row: {
          external_job_id: string | null
          job_id: string
          reason: string | null
          started_at: string | null
          status: string | null
          updated_at: string | null
          user_id: string
        }
        ComputedFields: never
        Insert: {
          external_job_id?: string | null
          job_id?: string | null
          reason?: never
          started_at?: string | null
          status?: string | null
          updated_at?: string | null
          user_id?: string | null
        }
        Update: {
          external_job_id?: string | null
          job_id?: string | null
          reason?: never
          started_at?: string | null
          status?: string | null
          updated_at?: string | null
          user_id?: string | null
        }
        Relationships: []
      }
      training_queue: {
        Row: {
          attempt: number
          base_model: string | null
          job_id: string
          need_gpu_memory_gb: number | null
          need_gpu_type: string | null
          need_gpus: number
          place: number | null
          priority: number
          queued_at: string | null
          run_after: string | null
          user_id: string
          waiting_reason: string | null
        }
        ComputedFields: never
        Relationships: []
      }
      training_throughput: {
        Row: {
          cancelled: number | null
          completed: number | null
          cost: number | null
          day: string | null
          failed: number | null
          mean_run_seconds: number | null
          mean_wait_seconds: number | null
        }
        ComputedFields: never
        Relationships: []
      }
      training_worker_status: {
        Row: {
          busy: number
          data: NonNullable<Json>
          device: string
          gpu_count: number
          gpu_memory_gb: number | null
          gpu_type: string | null
          host: string
          jobs: string[] | null
          last_seen_at: string
          pod: string | null
          slots: number
          started_at: string
          state: string | null
          versions: NonNullable<Json>
          worker_id: string
        }
        ComputedFields: never
        Relationships: []
      }
    }
    Functions: {
      cancel_training_job: { Args: { job_id: string }; Returns: Json }
      prune_training_history: {
        Args: { most?: number; older_than: string }
        Returns: {
          callbacks: number
          events: number
          metrics_points: number
        }[]
      }
      reap_expired_leases: {
        Args: { most?: number }
        Returns: {
          job_id: string
          state: string
        }[]
      }
      redeliver: { Args: { job_id: string; kind: string; target?: string }; Returns: Json }
      release_held_jobs: { Args: Record<PropertyKey, never>; Returns: number }
      resend_callback: { Args: { callback_id: string }; Returns: undefined }
      retry_training_job: { Args: { job_id: string }; Returns: Json }
      submit_training_job: { Args: { job: Json }; Returns: Json }
      training_check_limits: {
        Args: { deadline_at: string; max_attempts: number; max_cost: number; run_after: string }
        Returns: undefined
      }
      training_deliveries_of: { Args: { job: string }; Returns: Json }
      training_find_dispatchers: { Args: Record<PropertyKey, never>; Returns: Json }
      training_find_job: {
        Args: { wanted: string }
        Returns: {
          can_tell: boolean
          checkpoints: number
          dataset_exists: boolean
          epoch: number
          holder: Json
          job_exists: boolean
          state: string
          tables: string
        }[]
      }
      training_held_seconds: {
        Args: {
          job: Omit<
            Database['public']['Tables']['training_jobs']['Row'],
            Database['public']['Tables']['training_jobs']['ComputedFields']
          >
        }
        Returns: number
      }
      training_hiding_policies: {
        Args: Record<PropertyKey, never>
        Returns: {
          condition: string
          policy: string
          relation: string
          verb: string
        }[]
      }
      training_is_object_path: { Args: { path: string }; Returns: boolean }
      training_job_status: { Args: { job_id: string }; Returns: Json }
      training_make_deliveries: {
        Args: { job: string; job_epoch: number; owner_id: string; wanted: Json; worker: string }
        Returns: number
      }
      training_name_url: { Args: { url: string }; Returns: Record<string, unknown> }
      training_note_dispatcher: { Args: { job_id: string; said: string }; Returns: undefined }
      training_notify_user: {
        Args: {
          job: Omit<
            Database['public']['Tables']['training_jobs']['Row'],
            Database['public']['Tables']['training_jobs']['ComputedFields']
          >
          move: string
        }
        Returns: undefined
      }
      training_owns_file: { Args: { owner: string; path: string }; Returns: boolean }
      training_read_needs: { Args: { gpu_config: Json; hyperparameters: Json }; Returns: Record<string, unknown> }
      training_real_job: {
        Args: { wanted: string }
        Returns: {
          can_tell: boolean
          checkpoints: number
          dataset_exists: boolean
          epoch: number
          holder: Json
          job_exists: boolean
          state: string
          tables: string
        }[]
      }
      training_record_cost: {
        Args: {
          amount: number
          job: Omit<
            Database['public']['Tables']['training_jobs']['Row'],
            Database['public']['Tables']['training_jobs']['ComputedFields']
          >
        }
        Returns: undefined
      }
      training_require_owner: { Args: { owner_id: string }; Returns: undefined }
      training_sample_rows: {
        Args: { most?: number }
        Returns: {
          id: string
          relation: string
        }[]
      }
      training_status_json: {
        Args: {
          job: Omit<
            Database['public']['Tables']['training_jobs']['Row'],
            Database['public']['Tables']['training_jobs']['ComputedFields']
          >
        }
        Returns: Json
      }
    }
    Enums: {
      [_ in never]: never
    }
    CompositeTypes: {
      [_ in never]: never
    }
  }
}

type DatabaseWithoutInternals = Omit<Database, '__InternalSupabase'>

type DefaultSchema = DatabaseWithoutInternals[Extract<keyof Database, 'public'>]

export type Tables<
  DefaultSchemaTableNameOrOptions extends
    keyof (DefaultSchema['Tables'] & DefaultSchema['Views']) | { schema: keyof DatabaseWithoutInternals },
  TableName extends (DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions['schema']]['Tables'] &
        DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions['schema']]['Views'])
    : never) = never,
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions['schema']]['Tables'] &
      DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions['schema']]['Views'])[TableName] extends {
      Row: infer R
    }
    ? R
    : never
  : DefaultSchemaTableNameOrOptions extends keyof (DefaultSchema['Tables'] & DefaultSchema['Views'])
    ? (DefaultSchema['Tables'] & DefaultSchema['Views'])[DefaultSchemaTableNameOrOptions] extends {
        Row: infer R
      }
      ? R
      : never
    : never

export type TablesInsert<
  DefaultSchemaTableNameOrOptions extends keyof DefaultSchema['Tables'] | { schema: keyof DatabaseWithoutInternals },
  TableName extends (DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions['schema']]['Tables']
    : never) = never,
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions['schema']]['Tables'][TableName] extends {
      Insert: infer I
    }
    ? I
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema['Tables']
    ? DefaultSchema['Tables'][DefaultSchemaTableNameOrOptions] extends {
        Insert: infer I
      }
      ? I
      : never
    : never

export type TablesUpdate<
  DefaultSchemaTableNameOrOptions extends keyof DefaultSchema['Tables'] | { schema: keyof DatabaseWithoutInternals },
  TableName extends (DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions['schema']]['Tables']
    : never) = never,
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions['schema']]['Tables'][TableName] extends {
      Update: infer U
    }
    ? U
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema['Tables']
    ? DefaultSchema['Tables'][DefaultSchemaTableNameOrOptions] extends {
        Update: infer U
      }
      ? U
      : never
    : never

export type Enums<
  DefaultSchemaEnumNameOrOptions extends keyof DefaultSchema['Enums'] | { schema: keyof DatabaseWithoutInternals },
  EnumName extends (DefaultSchemaEnumNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions['schema']]['Enums']
    : never) = never,
> = DefaultSchemaEnumNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions['schema']]['Enums'][EnumName]
  : DefaultSchemaEnumNameOrOptions extends keyof DefaultSchema['Enums']
    ? DefaultSchema['Enums'][DefaultSchemaEnumNameOrOptions]
    : never

export type CompositeTypes<
  PublicCompositeTypeNameOrOptions extends
    keyof DefaultSchema['CompositeTypes'] | { schema: keyof DatabaseWithoutInternals },
  CompositeTypeName extends (PublicCompositeTypeNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions['schema']]['CompositeTypes']
    : never) = never,
> = PublicCompositeTypeNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions['schema']]['CompositeTypes'][CompositeTypeName]
  : PublicCompositeTypeNameOrOptions extends keyof DefaultSchema['CompositeTypes']
    ? DefaultSchema['CompositeTypes'][PublicCompositeTypeNameOrOptions]
    : never

export const Constants = {
  public: {
    Enums: {},
  },
} as const
